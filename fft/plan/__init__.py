"""What a layout costs on given machines, before anyone books them: arithmetic, no device, no weights."""
