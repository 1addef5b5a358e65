"""What the structure of a text tells of what comes next: grammars, and schemas."""
