"""Choice of the drafter: pure functions of host-side signals. Imports neither SGLang nor CUDA."""
