// Runs before the first paint, so that a chosen theme doesn't flash.
try {
  const theme = localStorage.getItem("culvert-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* storage is off: the system's theme it is */ }
document.documentElement.classList.add("js");
