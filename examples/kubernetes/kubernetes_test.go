// Package kubernetes has manifests for kustomize, to copy from.
package kubernetes

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/yaml"
	podsecurity "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// bin has kustomize and both programs.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "culvert-kubernetes-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		return m.Run()
	}())
}

var buildKustomize = sync.OnceValues(func() ([]byte, error) {
	return exec.Command("go", "-C", "kustomize", "build", "-o", filepath.Join(bin, "kustomize"), "sigs.k8s.io/kustomize/kustomize/v5").CombinedOutput()
})

var buildPrograms = sync.OnceValues(func() ([]byte, error) {
	for _, kind := range []string{"proxy", "client"} {
		if out, err := exec.Command("go", "build", "-o", filepath.Join(bin, "culvert-"+kind), "../../"+kind).CombinedOutput(); err != nil {
			return out, err
		}
	}
	return nil, nil
})

// kustomize returns what kustomize builds of a directory.
func kustomize(t *testing.T, dir string) []byte {
	t.Helper()
	if out, err := exec.Command("go", "-C", "kustomize", "mod", "download").CombinedOutput(); err != nil {
		externaltest.Missing(t, "kustomize can't be had: "+string(out))
	}
	if out, err := buildKustomize(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.Command(filepath.Join(bin, "kustomize"), "build", dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 { // it warns of what is deprecated
		t.Fatalf("kustomize build %s: %v\n%s", dir, err, &stderr)
	}
	return out
}

// workload is a set of pods.
type workload struct {
	kind, name string
	selector   *metav1.LabelSelector
	template   corev1.PodTemplateSpec
	claims     []corev1.PersistentVolumeClaim
}

// manifests are what kustomize built, by name.
type manifests struct {
	workloads  []workload
	services   map[string]*corev1.Service
	budgets    map[string]*policyv1.PodDisruptionBudget
	policies   map[string]*networkingv1.NetworkPolicy
	configMaps map[string]*corev1.ConfigMap
	secrets    map[string]*corev1.Secret
	accounts   map[string]*corev1.ServiceAccount
	namespace  *corev1.Namespace
}

// read decodes manifests. Kubernetes' own types, read strictly, are the schema: a field that
// they don't have, or have with another type, is an error.
func read(t *testing.T, text []byte) *manifests {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, policyv1.AddToScheme, networkingv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	m := &manifests{services: map[string]*corev1.Service{}, budgets: map[string]*policyv1.PodDisruptionBudget{}, policies: map[string]*networkingv1.NetworkPolicy{},
		configMaps: map[string]*corev1.ConfigMap{}, secrets: map[string]*corev1.Secret{}, accounts: map[string]*corev1.ServiceAccount{}}
	for documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text))); ; {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return m
		}
		if err != nil {
			t.Fatal(err)
		}
		object, _, err := decoder.Decode(document, nil, nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		if o, ok := object.(metav1.Object); ok && o.GetNamespace() != "culvert" && o.GetName() != "culvert" {
			t.Errorf("%T %s is in the namespace %q", object, o.GetName(), o.GetNamespace())
		}
		switch o := object.(type) {
		case *appsv1.StatefulSet:
			m.workloads = append(m.workloads, workload{"StatefulSet", o.Name, o.Spec.Selector, o.Spec.Template, o.Spec.VolumeClaimTemplates})
			if s := o.Spec.ServiceName; s == "" {
				t.Errorf("the set %s names no service", o.Name)
			}
		case *appsv1.DaemonSet:
			m.workloads = append(m.workloads, workload{"DaemonSet", o.Name, o.Spec.Selector, o.Spec.Template, nil})
		case *corev1.Service:
			m.services[o.Name] = o
		case *corev1.ServiceAccount:
			m.accounts[o.Name] = o
		case *corev1.ConfigMap:
			m.configMaps[o.Name] = o
		case *corev1.Secret:
			m.secrets[o.Name] = o
		case *corev1.Namespace:
			m.namespace = o
		case *policyv1.PodDisruptionBudget:
			m.budgets[o.Name] = o
		case *networkingv1.NetworkPolicy:
			m.policies[o.Name] = o
		default:
			t.Errorf("%T is not looked at here", o)
		}
	}
}

// hasPort tells whether a container has a port of that number or name.
func (w workload) hasPort(port intstr.IntOrString) bool {
	for _, c := range w.template.Spec.Containers {
		for _, p := range c.Ports {
			if p.Name == port.StrVal || port.StrVal == "" && p.ContainerPort == port.IntVal {
				return true
			}
		}
	}
	return false
}

// selected returns the one workload that a selector selects.
func (m *manifests) selected(t *testing.T, what string, selector labels.Selector) workload {
	t.Helper()
	var found []workload
	for _, w := range m.workloads {
		if selector.Matches(labels.Set(w.template.Labels)) {
			found = append(found, w)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s selects %d workloads, want one", what, len(found))
	}
	return found[0]
}

// TestManifests has kustomize build each directory, and checks what comes out against
// Kubernetes' types and its "restricted" rules for pods, and that what is named is there.
func TestManifests(t *testing.T) {
	selector := func(s *metav1.LabelSelector) labels.Selector {
		t.Helper()
		out, err := metav1.LabelSelectorAsSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for dir, names := range map[string][]string{
		"proxy":      {"culvert-proxy"},
		"cluster":    {"culvert-proxy", "etcd", "prometheus"},
		"agent":      {"culvert-client"},
		"node-agent": {"culvert-node-client"},
	} {
		t.Run(dir, func(t *testing.T) {
			m := read(t, kustomize(t, dir))
			var got []string
			for _, w := range m.workloads {
				got = append(got, w.name)
			}
			slices.Sort(got)
			if !slices.Equal(got, names) {
				t.Fatalf("the workloads are %q, want %q", got, names)
			}
			if m.namespace == nil || m.namespace.Labels["pod-security.kubernetes.io/enforce"] != "restricted" {
				t.Error("the namespace does not have its pods shut in")
			}
			for _, w := range m.workloads {
				spec := w.template.Spec
				for _, result := range evaluator.EvaluatePod(podsecurity.LevelVersion{Level: podsecurity.LevelRestricted, Version: podsecurity.LatestVersion()}, &w.template.ObjectMeta, &spec) {
					if !result.Allowed {
						t.Errorf("%s: %s: %s", w.name, result.ForbiddenReason, result.ForbiddenDetail)
					}
				}
				if found := m.selected(t, w.name, selector(w.selector)); found.name != w.name {
					t.Errorf("%s selects the pods of %s", w.name, found.name)
				}
				if spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
					t.Errorf("%s can speak to Kubernetes", w.name)
				}
				if account := spec.ServiceAccountName; account != "" && m.accounts[account] == nil {
					t.Errorf("%s has the account %s, which is not there", w.name, account)
				}
				volumes := map[string]bool{}
				for _, claim := range w.claims {
					volumes[claim.Name] = true
				}
				for _, volume := range spec.Volumes {
					volumes[volume.Name] = true
					if c := volume.ConfigMap; c != nil && m.configMaps[c.Name] == nil {
						t.Errorf("%s has a volume of the map %s, which is not there", w.name, c.Name)
					}
					if s := volume.Secret; s != nil && m.secrets[s.SecretName] == nil {
						t.Errorf("%s has a volume of the secret %s, which is not there", w.name, s.SecretName)
					}
				}
				for _, c := range spec.Containers {
					if root := c.SecurityContext.ReadOnlyRootFilesystem; root == nil || !*root {
						t.Errorf("%s can write to its image", c.Name)
					}
					if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() {
						t.Errorf("%s requests nothing", c.Name)
					}
					if c.ReadinessProbe == nil {
						t.Errorf("%s has no probe", c.Name)
					}
					for _, probe := range []*corev1.Probe{c.ReadinessProbe, c.LivenessProbe} {
						switch {
						case probe == nil:
						case probe.HTTPGet != nil && !w.hasPort(probe.HTTPGet.Port), probe.TCPSocket != nil && !w.hasPort(probe.TCPSocket.Port):
							t.Errorf("%s is probed at a port that it does not have", c.Name)
						}
					}
					for _, mount := range c.VolumeMounts {
						if !volumes[mount.Name] {
							t.Errorf("%s mounts %s, which is not there", c.Name, mount.Name)
						}
					}
				}
				if budget := m.budgets[w.name]; w.kind == "StatefulSet" && (budget == nil || m.selected(t, "a budget", selector(budget.Spec.Selector)).name != w.name) {
					t.Errorf("%s has no budget", w.name)
				}
				if p := m.policies[w.name]; p == nil || m.selected(t, "a policy", selector(&p.Spec.PodSelector)).name != w.name {
					t.Errorf("%s has no network policy", w.name)
				} else {
					for _, rule := range p.Spec.Ingress {
						for _, port := range rule.Ports {
							if port.Port == nil || !w.hasPort(*port.Port) {
								t.Errorf("the policy of %s opens %v, which it does not have", w.name, port.Port)
							}
						}
						for _, peer := range rule.From {
							if peer.PodSelector != nil {
								m.selected(t, "a policy", selector(peer.PodSelector))
							}
						}
					}
				}
			}
			for name, service := range m.services {
				w := m.selected(t, "the service "+name, labels.SelectorFromSet(service.Spec.Selector))
				for _, port := range service.Spec.Ports {
					target := port.TargetPort
					if target == (intstr.IntOrString{}) {
						target = intstr.FromInt32(port.Port)
					}
					if !w.hasPort(target) {
						t.Errorf("the service %s has the port %s, which no container of %s has", name, port.Name, w.name)
					}
				}
			}

			// The programs know their flags, and their configuration.
			if out, err := buildPrograms(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, w := range m.workloads {
				c := w.template.Spec.Containers[0]
				if !strings.HasPrefix(c.Name, "culvert-") {
					continue
				}
				files := t.TempDir() // what the pod mounts
				for _, volume := range w.template.Spec.Volumes {
					i := slices.IndexFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == volume.Name })
					if i < 0 {
						t.Fatalf("the volume %s is mounted nowhere", volume.Name)
					}
					content := map[string][]byte{}
					if volume.ConfigMap != nil {
						for name, text := range m.configMaps[volume.ConfigMap.Name].Data {
							// The files' paths are those of the pod, and have to be these.
							content[name] = []byte(strings.NewReplacer("/etc/", files+"/etc/", "/data", files+"/data").Replace(text))
						}
					} else {
						content = m.secrets[volume.Secret.SecretName].Data
					}
					at := filepath.Join(files, c.VolumeMounts[i].MountPath)
					if err := os.MkdirAll(at, 0o755); err != nil {
						t.Fatal(err)
					}
					for name, text := range content {
						if err := os.WriteFile(filepath.Join(at, name), text, 0o600); err != nil {
							t.Fatal(err)
						}
					}
				}
				var args []string
				for _, arg := range c.Args {
					args = append(args, strings.NewReplacer("=/", "="+files+"/", "$(NODE_NAME)", "node-1", "$(NODE_ADDRESS)", "10.0.0.1").Replace(arg))
				}
				program, check := filepath.Join(bin, c.Name), []string{"--version"} // comes after all flags were read
				want := "version"
				fails := false
				switch {
				case c.Name == "culvert-client":
					check, want = []string{"check-config"}, "proxy.example.net"
				case slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--config.file=") }):
					// What can't be listened on is found out after the configuration was read.
					args[slices.Index(args, "--web.listen-address=:8080")] = "--web.listen-address=192.0.2.1:1"
					check, want, fails = nil, "192.0.2.1:1: bind", true
				}
				if out, err := exec.Command(program, append(args, check...)...).CombinedOutput(); (err != nil) != fails || !strings.Contains(string(out), want) {
					t.Errorf("%s %s: %v\n%s", c.Name, strings.Join(args, " "), err, out)
				}
			}
		})
	}
}
