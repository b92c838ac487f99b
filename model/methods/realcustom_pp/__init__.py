"""RealCustom++ (Mao et al. 2024): image tokens from two views of a reference, for a real word in the prompt."""
