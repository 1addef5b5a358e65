"""SGLang's offline engine as a source of training data: answers and features."""
