"""The avatar model trained in minutes on one GPU: scenes are drawn and encoded on the device, and learned from there."""
