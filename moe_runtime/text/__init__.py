"""Tokenizer and detokenizer."""
