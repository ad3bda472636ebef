"""The recipe that trains locas's two built-in backbones; see README.md beside this file, and run main.py."""
