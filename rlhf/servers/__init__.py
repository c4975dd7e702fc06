"""Clients of servers with OpenAI's chat API: OpenAI itself, vLLM, SGLang, llama.cpp, `transformers serve`, ..."""
