"""The index stream that rank 0 broadcasts, and the loader that reads those samples."""
