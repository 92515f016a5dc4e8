"""Operations the models are made of, per device: attention over packed documents, the loss."""
