"""From the files that people have to validated pairs, prompts and a corpus, without a row lost in silence."""
