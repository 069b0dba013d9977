"""What a program needs of a chip, read off the program that is compiled for it."""
