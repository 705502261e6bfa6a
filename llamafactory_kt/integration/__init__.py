"""The only room that knows LLaMA-Factory's internals: one file per hooked module, which says what it expects of that module.

It translates: a configuration into our arguments, LLaMA-Factory's calls into ours, our report into its log.
"""
