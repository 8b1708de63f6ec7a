"""From the JSON that training and decoding leave behind to tables, figures and pages; loads no model."""
