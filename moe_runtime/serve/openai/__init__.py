"""OpenAI's protocol: request bodies, routes and replies."""
