"""What models write besides plain text: tool calls and thoughts, in the wire format of each family."""
