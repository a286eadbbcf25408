"""Pack: conversations to rows of tokens, with the loss on what the model should say."""
