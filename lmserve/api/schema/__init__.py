"""The wire: what a request body may hold and what an answer looks like. msgspec structs, nothing else."""
