"""Reports: plain records in, one HTML file out that needs neither a server nor a network."""
