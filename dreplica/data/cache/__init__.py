"""Caches of decoded images, on the device or shared between the processes of a node."""
