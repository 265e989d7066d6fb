"""Language models of both families behind one interface of pure functions (``models.build``)."""
