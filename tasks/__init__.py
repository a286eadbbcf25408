"""One folder per verb; the nouns, knobs and errors they share stand beside this file."""
