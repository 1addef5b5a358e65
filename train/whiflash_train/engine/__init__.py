"""SGLang's offline engine, which writes training data."""
