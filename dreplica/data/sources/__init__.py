"""Data sets by name: digits, image folders, torchvision data sets and user functions."""
