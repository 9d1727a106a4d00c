"""Judge detectors of attacked images, also by an attacker who knows them."""
