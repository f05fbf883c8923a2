"""What a run says about itself: numbers of a step, the file and the bar, reporters."""
