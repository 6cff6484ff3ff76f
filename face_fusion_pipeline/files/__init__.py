"""Files and folders, as every room reads and writes them: whole or not at all, in any encoding, without litter."""
