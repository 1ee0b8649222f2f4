"""Identity checks that model, criterion, optimizer and scheduler belong together.

The checks read no values and run no step. They catch setups that train nothing, or something other than intended,
without any exception from torch.
"""
