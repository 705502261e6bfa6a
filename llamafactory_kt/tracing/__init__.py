"""A decoder layer's steps for one token, recorded while it computes and from then on computed in one call of the native kernels."""
