"""MatrixInfer Gateway: sends every LLM request to the pod that already holds its prompt in KV cache."""

__version__ = "0.1.0"
