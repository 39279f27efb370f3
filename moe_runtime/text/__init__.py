"""Between text and tokens: tokenizer and detokenizer."""
