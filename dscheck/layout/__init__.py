"""The algebra of boxes: how a global tensor is cut, who writes which piece, and the proof that the pieces tile it."""
