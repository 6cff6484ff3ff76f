"""What goes up to the Hugging Face Hub: the model card, the files of a repository, and the upload."""
