"""What everything else stands on: names, configuration, errors, numbers, states, costs, files."""
