"""From a model's output to reasoning, content and tool calls: one file for each way of writing calls."""
