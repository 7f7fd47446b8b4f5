"""The engine simulator: speaks vLLM's API, flags and metrics; no GPU, no model, no dependency.

It batches and queues like vLLM by a stated service curve, and says in every answer and in its
`Server` header that it is a simulator. `python -m lab.engine <model folder> [vLLM's flags]`.
"""
