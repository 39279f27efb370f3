"""OpenAI's protocol: request bodies, endpoints and replies."""
