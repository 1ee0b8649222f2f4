"""Data sets by name: image folders, torchvision data sets and sample weights."""
