"""The only writer of files, media and run folders."""
