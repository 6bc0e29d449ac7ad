"""Frame-Voyager: which combination of frames a Video-LLM should see, learned from the losses it has on combinations."""
