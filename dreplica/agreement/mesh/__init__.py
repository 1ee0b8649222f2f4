"""Agreement on a device mesh: which ranks hold the same bytes of a tensor, and one comparison for all of them."""
