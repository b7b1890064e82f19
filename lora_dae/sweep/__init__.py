"""Many runs: one process per job, nothing trained twice, one table and one report over all of them."""
