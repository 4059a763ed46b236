"""A traced model as one native program: C++ of ours and of the trace, compiled at first use."""
