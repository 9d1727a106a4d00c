const place = document.getElementById("api");

window.SwaggerUIBundle({
  url: place.dataset.spec,
  domNode: place,
  deepLinking: true,
  requestInterceptor: (request) => {
    request.headers["X-CSRF-Token"] = place.dataset.csrf;
    return request;
  },
});
