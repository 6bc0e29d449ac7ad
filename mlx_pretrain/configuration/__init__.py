"""Configuration by gin: reading its files, checking the values, and the help of a command."""
