// Shows the contract. A file of its own, because the page allows no inline script.
SwaggerUIBundle({
  url: '/openapi.json',
  dom_id: '#contract',
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  // Else the contract is sent to swagger.io for a badge.
  validatorUrl: null,
});
