"""Which drafter drafts: pure functions of host-side signals. Imports neither SGLang nor CUDA."""
