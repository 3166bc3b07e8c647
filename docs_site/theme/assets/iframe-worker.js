// The theme searches in a Worker, which browsers refuse to a page that was opened from a folder. There,
// the Worker's script runs in a hidden frame, and messages go the same ways.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.append(this.frame);
      const inside = this.frame.contentWindow;
      this.loaded = new Promise((resolve) => {
        inside.postMessage = (data) => {
          const event = new MessageEvent("message", { data });
          this.dispatchEvent(event);
          this.onmessage?.(event);
        };
        inside.importScripts = (...urls) =>
          urls.reduce((before, one) => before.then(() => load(inside.document, one)), Promise.resolve());
        load(inside.document, url).then(resolve);
      });
    }

    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.loaded.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };

  const load = (page, url) =>
    new Promise((resolve, reject) => {
      const script = page.createElement("script");
      Object.assign(script, { src: url, onload: resolve, onerror: reject });
      page.documentElement.append(script);
    });
}
