"""How an output has to look: JSON schemas and other grammars; the API process proves them, the worker keeps to them."""
