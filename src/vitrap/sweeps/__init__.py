"""Many runs: the grid that names them, what is ahead, and workers that do them, here or on Ray."""
