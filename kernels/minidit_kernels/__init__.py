"""minidit's kernels: each file defines an operation in plain torch; fast forms stand beside it."""
