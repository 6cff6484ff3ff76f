"""The avatar model trained in minutes on one GPU: scenes are drawn, encoded and learned from on the device."""
