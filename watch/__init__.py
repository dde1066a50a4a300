"""A watch on the engines: reads the newest releases of vLLM and SGLang, and says what the gateway does not know of them.

`python -m watch FOLDER` (`make check-engines`) downloads them into FOLDER. Their sources are parsed, never imported.
"""
